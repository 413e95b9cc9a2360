// Causal attention of the documents of a flat row, forward and backward: in fp32, and in bf16 where AVX-512 or AMX
// multiplies it.
//
// A part is some queries of one document with all keys that they see; a task is a part and one key head, whose keys
// are packed once for all its query heads. A block of queries, of several heads below each other, passes over its keys
// at once, so that scores and shares live in the cache of a core and nothing of queries × keys is ever written to
// memory. Sums are fp32; shares and the slopes of scores are rounded to T for their products. What a key gathers from
// several parts is added in the order of the parts, so that the number of threads changes no bit.
//
// T is float or bf16. Pairs: two bf16 in 32 bits, as the instructions want them. "Along D" they are two numbers of one
// row, and "along rows" one number each of two rows. H query and K key heads; D numbers of a head, a multiple of 32; M
// keys of a part, and `pitch` places for each row of scores and of keys turned.

#include "vectors.hpp"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include <omp.h>
#if defined(__AMX_BF16__) && defined(__AVX512BF16__)
#define AMX
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr long STEP = 32;         // rows, columns and terms of a product are multiples of it
constexpr long SCORES = 1 << 17;  // of a block at most, if it has more than STEP rows: a quarter of a core's cache
constexpr long HEADS = 4;         // of a block at most
constexpr long GAP = 16;          // places between rows, so that equal columns do not share a place in the cache

using pair = uint32_t;

inline long up(long count) { return (count + STEP - 1) / STEP * STEP; }

// Queries [first, last) of a document and their keys: rows [before, before_end), which it continues, and [own, last).
struct Part {
    int32_t first, last, own, before, before_end;

    long common() const { return before_end - before; }
    long keys() const { return common() + last - own; }
    long row(long key) const { return key < common() ? before + key : own + key - common(); }
};

struct Shape {
    long H, K, D, window;  // window 0: none
    float scale;

    long group() const { return H / K; }
};

// The keys that a query sees: [low, high).
struct Sight {
    long low, high;
    Sight(const Part &part, const Shape &shape, long query) : low(0), high(part.common() + query - part.own + 1) {
        if (shape.window && high > shape.window) low = high - shape.window;
    }
};

// What the right side of a product consists of: so many numbers, one below the other.
template <class T>
struct Right;
template <>
struct Right<float> {
    using type = float;
    static constexpr long TERMS = 1;
};
template <>
struct Right<bf16> {
    using type = pair;
    static constexpr long TERMS = 2;
};

// -- products: C [rows, columns] = or += A [rows, terms] · B [terms, columns], in multiples of 32, and so many places
// between the rows of each

// ROWS rows of C, two vectors of its columns at a time.
template <bool ADD, int ROWS>
inline void rows_of_product(float *C, long ldc, const float *A, long lda, const float *B, long ldb, long columns,
                            long terms) {
    for (long column = 0; column < columns; column += 2 * LANES) {
        const float *b = B + column;
        float *c = C + column;
        floats sums[ROWS][2] = {};
        if (ADD)
#pragma GCC unroll 8
            for (int row = 0; row < ROWS; row++)
                for (int half = 0; half < 2; half++) sums[row][half] = load(c + row * ldc + LANES * half);
        for (long term = 0; term < terms; term++, b += ldb) {
            floats left = load(b), right = load(b + LANES);
#pragma GCC unroll 8
            for (int row = 0; row < ROWS; row++) {
                sums[row][0] += A[row * lda + term] * left;
                sums[row][1] += A[row * lda + term] * right;
            }
        }
#pragma GCC unroll 8
        for (int row = 0; row < ROWS; row++)
            for (int half = 0; half < 2; half++) store(c + row * ldc + LANES * half, sums[row][half]);
    }
}

template <bool ADD>
void product(float *C, long ldc, const float *A, long lda, const float *B, long ldb, long rows, long columns,
             long terms) {
    constexpr int ROWS = LANES == 16 ? 8 : 6;  // as many sums as fit in registers, beside what is multiplied
    long row = 0;
    for (; row + ROWS <= rows; row += ROWS)
        rows_of_product<ADD, ROWS>(C + row * ldc, ldc, A + row * lda, lda, B, ldb, columns, terms);
    for (; row < rows; row += 2)
        rows_of_product<ADD, 2>(C + row * ldc, ldc, A + row * lda, lda, B, ldb, columns, terms);
}

#ifdef AMX
bool has_tiles() {  // Linux lends the tiles to who asks for them
    static const bool granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
    return granted;
}

struct Tiles {  // of one thread: eight, of 16 rows of 64 bytes
    Tiles() {
        static const struct alignas(64) {  // static, since GCC before 13.3 does not say that all of it is read
            uint8_t palette = 1, start = 0, unused[14] = {};
            uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
            uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
        } shapes{};
        if (has_tiles()) _tile_loadconfig(&shapes);
    }
    ~Tiles() {
        if (has_tiles()) _tile_release();
    }
};

template <bool ADD>
void product_by_tiles(float *C, long ldc, const bf16 *A, long lda, const pair *B, long ldb, long rows, long columns,
                      long terms) {
    asm volatile("" ::: "memory");  // what A, B and C hold is written before tiles are loaded from it
    for (long column = 0; column < columns; column += 32)
        for (long row = 0; row < rows; row += 32) {
            float *c = C + row * ldc + column;
            if (ADD) {
                _tile_loadd(0, c, ldc * 4);
                _tile_loadd(1, c + 16, ldc * 4);
                _tile_loadd(2, c + 16 * ldc, ldc * 4);
                _tile_loadd(3, c + 16 * ldc + 16, ldc * 4);
            } else {
                _tile_zero(0);
                _tile_zero(1);
                _tile_zero(2);
                _tile_zero(3);
            }
            for (long term = 0; term < terms; term += 32) {
                const bf16 *a = A + row * lda + term;
                const pair *b = B + term / 2 * ldb + column;
                _tile_loadd(4, a, lda * 2);
                _tile_loadd(6, b, ldb * 4);
                _tile_dpbf16ps(0, 4, 6);
                _tile_loadd(7, b + 16, ldb * 4);
                _tile_dpbf16ps(1, 4, 7);
                _tile_loadd(5, a + 16 * lda, lda * 2);
                _tile_dpbf16ps(2, 5, 6);
                _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, c, ldc * 4);
            _tile_stored(1, c + 16, ldc * 4);
            _tile_stored(2, c + 16 * ldc, ldc * 4);
            _tile_stored(3, c + 16 * ldc + 16, ldc * 4);
        }
}
#else
struct Tiles {};
#endif

#ifdef __AVX512BF16__
template <bool ADD>
void product(float *C, long ldc, const bf16 *A, long lda, const pair *B, long ldb, long rows, long columns,
             long terms) {
#ifdef AMX
    if (has_tiles()) return product_by_tiles<ADD>(C, ldc, A, lda, B, ldb, rows, columns, terms);
#endif
    constexpr int ROWS = 8;
    for (long column = 0; column < columns; column += 32)
        for (long first = 0; first < rows; first += ROWS) {
            float *c = C + first * ldc + column;
            __m512 sums[ROWS][2];
#pragma GCC unroll 8
            for (int row = 0; row < ROWS; row++)
                for (int half = 0; half < 2; half++)
                    sums[row][half] = ADD ? _mm512_loadu_ps(c + row * ldc + 16 * half) : _mm512_setzero_ps();
            for (long term = 0; term < terms; term += 2) {
                const pair *b = B + term / 2 * ldb + column;
                __m512bh left = (__m512bh)_mm512_loadu_si512(b), right = (__m512bh)_mm512_loadu_si512(b + 16);
#pragma GCC unroll 8
                for (int row = 0; row < ROWS; row++) {
                    int32_t both;
                    std::memcpy(&both, A + (first + row) * lda + term, sizeof both);
                    __m512bh a = (__m512bh)_mm512_set1_epi32(both);
                    sums[row][0] = _mm512_dpbf16_ps(sums[row][0], a, left);
                    sums[row][1] = _mm512_dpbf16_ps(sums[row][1], a, right);
                }
            }
#pragma GCC unroll 8
            for (int row = 0; row < ROWS; row++)
                for (int half = 0; half < 2; half++) _mm512_storeu_ps(c + row * ldc + 16 * half, sums[row][half]);
        }
}
#endif

// -- orders in memory

// to [LANES, LANES] = from [LANES, LANES] turned, of 32 bits each.
inline void turn(uint32_t *to, long to_pitch, const uint32_t *from, long from_pitch) {
    words rows[LANES];
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) std::memcpy(&rows[i], from + i * from_pitch, sizeof rows[i]);
#pragma GCC unroll 4
    for (int apart = 1; apart < LANES; apart *= 2) {  // numbers whose row and lane differ in this digit change places
        ints lane = counted_from(0), first = (lane & apart) != 0 ? lane + (LANES - apart) : lane;
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            if (!(i & apart)) {
                words one = rows[i], other = rows[i + apart];
                rows[i] = __builtin_shuffle(one, other, first);
                rows[i + apart] = __builtin_shuffle(one, other, first + apart);
            }
    }
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) std::memcpy(to + i * to_pitch, &rows[i], sizeof rows[i]);
}

// to [columns, rows] = from [rows, columns] turned, of 32 bits each.
inline void turned(uint32_t *to, long to_pitch, const uint32_t *from, long from_pitch, long rows, long columns) {
    for (long row = 0; row < rows; row += LANES)
        for (long column = 0; column < columns; column += LANES)
            turn(to + column * to_pitch + row, to_pitch, from + row * from_pitch + column, from_pitch);
}

// x [rows, D] and x turned [D, rows] as right sides of products, and turned as a left one. In bf16, the last goes by
// way of `pairs` [rows / 2, D].
inline void to_right(float *to, const float *x, long rows, long D) { std::memcpy(to, x, rows * D * sizeof(float)); }
inline void to_right_turned(float *to, long pitch, const float *x, long rows, long D) {
    turned((uint32_t *)to, pitch, (const uint32_t *)x, D, rows, D);
}
inline void to_left_turned(float *to, pair *, const float *x, long rows, long D) {
    turned((uint32_t *)to, rows, (const uint32_t *)x, D, rows, D);
}

#ifdef __AVX512BF16__
inline __m512i paired(__m256i low, __m256i high) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

inline void to_right(pair *to, const bf16 *x, long rows, long D) {  // pairs along rows
    for (long row = 0; row < rows; row += 2)
        for (long i = 0; i < D; i += 16) {
            const bf16 *from = x + row * D + i;
            __m256i low = _mm256_loadu_si256((const __m256i *)from);
            __m256i high = _mm256_loadu_si256((const __m256i *)(from + D));
            _mm512_storeu_si512(to + row / 2 * D + i, paired(low, high));
        }
}
inline void to_right_turned(pair *to, long pitch, const bf16 *x, long rows, long D) {  // pairs along D
    turned(to, pitch, (const uint32_t *)x, D / 2, rows, D / 2);
}
inline void to_left_turned(bf16 *to, pair *pairs, const bf16 *x, long rows, long D) {
    to_right(pairs, x, rows, D);
    turned((uint32_t *)to, rows / 2, pairs, D, rows / 2, D);
}
#endif

// One head of the keys of a part, [M, D], and zeros up to `padded` rows.
template <class T>
inline void gather_keys(T *to, const T *x, const Part &part, const Shape &shape, long head, long padded) {
    long D = shape.D, keys = part.keys();
    for (long key = 0; key < keys; key++)
        std::memcpy(to + key * D, x + (part.row(key) * shape.K + head) * D, D * sizeof(T));
    std::memset((void *)(to + keys * D), 0, (padded - keys) * D * sizeof(T));
}

// -- memory of a thread

struct Freed {
    void operator()(void *memory) const { std::free(memory); }
};

// Numbers on whole cache lines, not set to anything.
template <class T>
class Numbers {
  public:
    explicit Numbers(long count) : memory((T *)std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64)) {
        if (!memory && count) throw std::bad_alloc();
    }
    operator T *() const { return memory.get(); }

  private:
    std::unique_ptr<T, Freed> memory;
};

// Shares as the left side of a product: fp32 ones stay in the place of their scores.
template <class T>
struct Shares : Numbers<T> {
    Shares(float *, long count) : Numbers<T>(count) {}
};
template <>
struct Shares<float> {
    float *place;
    Shares(float *scores, long) : place(scores) {}
    operator float *() const { return place; }
};

// Shares as the right side of a product, and slopes of scores as either: fp32 ones in the place of scores, and of the
// slopes of shares.
template <class T>
struct ScoreSlopes {
    Numbers<typename Right<T>::type> shares, right;
    Numbers<T> left;
    ScoreSlopes(float *, float *, long count)
        : shares(count / Right<T>::TERMS), right(count / Right<T>::TERMS), left(count) {}
};
template <>
struct ScoreSlopes<float> {
    float *shares, *right, *left;
    ScoreSlopes(float *scores, float *share_slopes, long) : shares(scores), right(share_slopes), left(share_slopes) {}
};

// -- one block of queries

// How many queries of how many heads make a block: many, for the products; few, for the cache.
struct Size {
    long queries, heads;
    Size(long M, const Shape &shape) {
        long steps = SCORES / (STEP * M);
        heads = std::max(1l, std::min({steps, HEADS, shape.group()}));
        queries = steps >= 2 * heads && heads < 3 ? 2 * STEP : STEP;
    }
    long rows() const { return queries * heads; }
};

// `count` queries from `first` on, of some heads, `step` rows for each head; and the keys [begin, end) that some of
// them see, in multiples of 32.
struct Block {
    long first, count, step, head, heads, rows, begin, end;
    Block(const Part &part, const Shape &shape, const Size &size, long query, long first_head, long last_head)
        : first(query), count(std::min(size.queries, part.last - query)), step(up(count)), head(first_head),
          heads(std::min(size.heads, last_head - first_head)), rows(heads * step),
          begin(Sight(part, shape, query).low / STEP * STEP), end(up(Sight(part, shape, query + count - 1).high)) {}

    bool has(long row) const { return row % step < count; }
    long query(long row) const { return first + row % step; }
    long head_of(long row) const { return head + row / step; }
};

// Calls body(block) for all blocks of a part and one key head.
template <class Body>
inline void each_block(const Part &part, const Shape &shape, long key_head, Body body) {
    const Size size(up(part.keys()), shape);
    long last_head = (key_head + 1) * shape.group();
    for (long head = key_head * shape.group(); head < last_head; head += size.heads)
        for (long query = part.first; query < part.last; query += size.queries)
            body(Block(part, shape, size, query, head, last_head));
}

// The rows of a block, [rows, D], and zeros for those that have no query.
template <class T>
inline void gather_queries(T *to, const T *x, const Block &block, const Shape &shape) {
    for (long row = 0; row < block.rows; row++, to += shape.D)
        if (block.has(row))
            std::memcpy(to, x + (block.query(row) * shape.H + block.head_of(row)) * shape.D, shape.D * sizeof(T));
        else
            std::memset((void *)to, 0, shape.D * sizeof(T));
}

template <class T>
inline void scatter_query(T *out, const float *rows, float factor, const Block &block, long row, const Shape &shape) {
    T *to = out + (block.query(row) * shape.H + block.head_of(row)) * shape.D;
    for (long i = 0; i < shape.D; i += LANES) store(to + i, load(rows + row * shape.D + i) * factor);
}

// Scores of one query times `scale`, and their largest.
inline float scaled_scores(float *scores, const Sight &sight, float scale) {
    floats most = -INFINITY + floats{};
    for (long i = sight.low & -LANES; i < sight.high; i += LANES) {
        floats value = only(load(scores + i) * scale, i, sight.low, sight.high);
        store(scores + i, value);
        most = larger(value, most);
    }
    return most_of(most);
}

template <class T>
inline void clear(T *row, long from, long to) {
    if (to > from) std::memset((void *)(row + from), 0, (to - from) * sizeof(T));
}

// -- forward

template <class T>
struct Forward {  // for up to M keys and so many rows of queries
    long pitch;
    Numbers<T> rows, queries;
    Numbers<typename Right<T>::type> keys, values;
    Numbers<float> scores, outs, sums;
    Shares<T> shares;

    Forward(long M, long D, long N)
        : pitch(M + GAP), rows(M * D), queries(N * D), keys(pitch * D / Right<T>::TERMS),
          values(M * D / Right<T>::TERMS), scores(N * pitch), outs(N * D), sums(N), shares(scores, N * pitch) {}
};

// e to the scores less their largest, and their sums: what divides the outputs of a query.
template <class T>
void softmax_of(Forward<T> &f, const Part &part, const Shape &shape, const Block &block) {
    for (long row = 0; row < block.rows; row++) {
        T *share = f.shares + row * f.pitch;
        if (!block.has(row)) {
            clear(share, block.begin, block.end);
            continue;
        }
        const Sight sight(part, shape, block.query(row));
        float *score = f.scores + row * f.pitch, largest = scaled_scores(score, sight, shape.scale);
        floats sum{};
        long i = sight.low & -LANES;
        clear(share, block.begin, i);
        for (; i < sight.high; i += LANES) {
            floats value = exp_of<T>(load(score + i) - largest);
            store(share + i, value);
            sum += value;
        }
        clear(share, i, block.end);
        f.sums[row] = sum_of(sum);
    }
}

template <class T>
void attend_part(T *out, const T *q, const T *k, const T *v, const Part &part, const Shape &shape, long key_head,
                 Forward<T> &f) {
    long D = shape.D, M = up(part.keys());
    gather_keys<T>(f.rows, k, part, shape, key_head, M);
    to_right_turned(f.keys, f.pitch, f.rows, M, D);
    gather_keys<T>(f.rows, v, part, shape, key_head, M);
    to_right(f.values, f.rows, M, D);
    each_block(part, shape, key_head, [&](const Block &block) {
        long begin = block.begin, seen = block.end - begin, rows = block.rows;
        gather_queries<T>(f.queries, q, block, shape);
        product<false>(f.scores + begin, f.pitch, f.queries, D, f.keys + begin, f.pitch, rows, seen, D);
        softmax_of(f, part, shape, block);
        auto values = f.values + begin / Right<T>::TERMS * D;
        product<false>(f.outs, D, f.shares + begin, f.pitch, values, D, rows, D, seen);
        for (long row = 0; row < rows; row++)
            if (block.has(row)) scatter_query(out, f.outs, 1.0f / f.sums[row], block, row, shape);
    });
}

// -- backward

template <class T>
struct Backward {  // for up to M keys and N rows of queries
    static constexpr long TERMS = Right<T>::TERMS;
    long pitch;
    Numbers<T> rows, queries, slopes, queries_turned, slopes_turned;
    Numbers<typename Right<T>::type> keys_turned, values_turned, keys;
    Numbers<pair> pairs;
    Numbers<float> scores, share_slopes, query_slopes;
    ScoreSlopes<T> given;

    Backward(long M, long D, long N)
        : pitch(M + GAP), rows(M * D), queries(N * D), slopes(N * D), queries_turned(N * D), slopes_turned(N * D),
          keys_turned(pitch * D / TERMS), values_turned(pitch * D / TERMS), keys(M * D / TERMS),
          pairs(TERMS == 2 ? N * D / 2 : 0), scores(N * pitch), share_slopes(N * pitch), query_slopes(N * D),
          given(scores, share_slopes, N * pitch) {}
};

struct Share {
    float factor, along;  // of e to the scores; the sum of shares times their slopes
};

// e to the scores less their largest in their own place, zeros where nothing is seen, and what makes shares of them.
template <class T>
Share exponentials(Backward<T> &b, const Part &part, const Shape &shape, const Block &block, long row) {
    float *score = b.scores + row * b.pitch;
    const float *slope = b.share_slopes + row * b.pitch;
    if (!block.has(row)) {
        clear(score, block.begin, block.end);
        return {0, 0};
    }
    const Sight sight(part, shape, block.query(row));
    float largest = scaled_scores(score, sight, shape.scale);
    floats sum{}, products{};
    long i = sight.low & -LANES;
    clear(score, block.begin, i);
    for (; i < sight.high; i += LANES) {
        floats value = exp_of<T>(load(score + i) - largest);
        store(score + i, value);
        sum += value;
        products += value * load(slope + i);
    }
    clear(score, i, block.end);
    float factor = 1.0f / sum_of(sum);
    return {factor, factor * sum_of(products)};
}

// Shares, and the slopes of scores from those of shares, of all queries of a block.
void slopes_of_scores(Backward<float> &b, const Part &part, const Shape &shape, const Block &block) {
    for (long row = 0; row < block.rows; row++) {
        const Share one = exponentials(b, part, shape, block, row);
        float *score = b.scores + row * b.pitch, *slope = b.share_slopes + row * b.pitch;
        for (long i = block.begin; i < block.end; i += LANES) {
            floats share = load(score + i) * one.factor;
            store(score + i, share);
            store(slope + i, shape.scale * share * (load(slope + i) - one.along));
        }
    }
}

#ifdef __AVX512BF16__
inline __m256i in_bf16(floats x) { return (__m256i)_mm512_cvtneps_pbh((__m512)x); }

void slopes_of_scores(Backward<bf16> &b, const Part &part, const Shape &shape, const Block &block) {
    for (long row = 0; row < block.rows; row += 2) {
        const Share one = exponentials(b, part, shape, block, row), two = exponentials(b, part, shape, block, row + 1);
        long at = row * b.pitch, next = at + b.pitch, half = row / 2 * b.pitch;
        for (long i = block.begin; i < block.end; i += LANES) {
            floats share = load(b.scores + at + i) * one.factor, other = load(b.scores + next + i) * two.factor;
            floats slope = shape.scale * share * (load(b.share_slopes + at + i) - one.along);
            floats another = shape.scale * other * (load(b.share_slopes + next + i) - two.along);
            __m256i low = in_bf16(slope), high = in_bf16(another);
            _mm512_storeu_si512(b.given.shares + half + i, paired(in_bf16(share), in_bf16(other)));
            _mm512_storeu_si512(b.given.right + half + i, paired(low, high));
            _mm256_storeu_si256((__m256i *)(b.given.left + at + i), low);
            _mm256_storeu_si256((__m256i *)(b.given.left + next + i), high);
        }
    }
}
#endif

// dq of a part's queries; dk and dv of its keys for one key head, turned [D, M] each.
template <class T>
void attend_part_backward(T *dq, float *dk, float *dv, const T *d, const T *q, const T *k, const T *v, const Part &part,
                          const Shape &shape, long key_head, Backward<T> &b) {
    long D = shape.D, M = up(part.keys());
    gather_keys<T>(b.rows, v, part, shape, key_head, M);
    to_right_turned(b.values_turned, b.pitch, b.rows, M, D);
    gather_keys<T>(b.rows, k, part, shape, key_head, M);
    to_right_turned(b.keys_turned, b.pitch, b.rows, M, D);
    to_right(b.keys, b.rows, M, D);
    clear(dk, 0, D * M);
    clear(dv, 0, D * M);
    each_block(part, shape, key_head, [&](const Block &block) {
        long begin = block.begin, seen = block.end - begin, rows = block.rows;
        gather_queries<T>(b.queries, q, block, shape);
        gather_queries<T>(b.slopes, d, block, shape);
        product<false>(b.scores + begin, b.pitch, b.queries, D, b.keys_turned + begin, b.pitch, rows, seen, D);
        product<false>(b.share_slopes + begin, b.pitch, b.slopes, D, b.values_turned + begin, b.pitch, rows, seen, D);
        slopes_of_scores(b, part, shape, block);
        to_left_turned(b.queries_turned, b.pairs, b.queries, rows, D);
        to_left_turned(b.slopes_turned, b.pairs, b.slopes, rows, D);
        product<true>(dv + begin, M, b.slopes_turned, rows, b.given.shares + begin, b.pitch, D, seen, rows);
        product<true>(dk + begin, M, b.queries_turned, rows, b.given.right + begin, b.pitch, D, seen, rows);
        auto keys = b.keys + begin / Right<T>::TERMS * D;
        product<false>(b.query_slopes, D, b.given.left + begin, b.pitch, keys, D, rows, D, seen);
        for (long row = 0; row < rows; row++)
            if (block.has(row)) scatter_query(dq, b.query_slopes, 1.0f, block, row, shape);
    });
}

// Adds what a part found for its keys, turned [D, M], to rows of out [., K, D]: LANES numbers of one head from i on.
void add_turned(float *out, const float *found, const Part &part, const Shape &shape, long head, long i) {
    alignas(64) float rows[LANES * LANES];
    long keys = part.keys(), M = up(keys);
    for (long key = 0; key < keys; key += LANES) {
        turn((uint32_t *)rows, LANES, (const uint32_t *)found + i * M + key, M);
        for (long n = 0; n < LANES && key + n < keys; n++) {
            float *to = out + (part.row(key + n) * shape.K + head) * shape.D + i;
            store(to, load(to) + load(rows + LANES * n));
        }
    }
}

long most_keys(const Part *parts, long count) {
    long most = 0;
    for (long n = 0; n < count; n++) most = std::max(most, parts[n].keys());
    return up(most);
}

// Rows of the largest block of these parts.
long most_rows(const Part *parts, long count, const Shape &shape) {
    long most = 0;
    for (long n = 0; n < count; n++) most = std::max(most, Size(up(parts[n].keys()), shape).rows());
    return most;
}

// Memory of its own for each thread, there before they begin: among them, nobody could say that there is none.
template <class Space>
std::vector<std::unique_ptr<Space>> spaces_for(const Part *parts, long count, const Shape &shape) {
    std::vector<std::unique_ptr<Space>> spaces;
    long keys = most_keys(parts, count), rows = most_rows(parts, count, shape);
    for (int n = 0; n < omp_get_max_threads(); n++) spaces.push_back(std::make_unique<Space>(keys, shape.D, rows));
    return spaces;
}

template <class T>
void attend(T *out, const T *q, const T *k, const T *v, const Part *parts, long count, const Shape &shape) {
    auto spaces = spaces_for<Forward<T>>(parts, count, shape);
#pragma omp parallel
    {
        Tiles tiles;
        Forward<T> &space = *spaces[omp_get_thread_num()];
#pragma omp for schedule(dynamic)
        for (long task = count * shape.K - 1; task >= 0; task--)  // of a document, the last parts have most keys
            attend_part(out, q, k, v, parts[task / shape.K], shape, task % shape.K, space);
    }
}

// Some parts: `place` says where in `found` each leaves dk and dv of its keys, before they are added.
template <class T>
void attend_backward(T *dq, float *dk, float *dv, float *found, const T *d, const T *q, const T *k, const T *v,
                     const Part *parts, const long *place, long count, const Shape &shape) {
    auto spaces = spaces_for<Backward<T>>(parts, count, shape);
    long K = shape.K, D = shape.D;
    auto of = [&](long part, long head, long which) {
        return found + place[part] + (2 * head + which) * D * up(parts[part].keys());
    };
#pragma omp parallel
    {
        Tiles tiles;
        Backward<T> &space = *spaces[omp_get_thread_num()];
#pragma omp for schedule(dynamic)
        for (long task = count * K - 1; task >= 0; task--) {
            long part = task / K, head = task % K;
            attend_part_backward(dq, of(part, head, 0), of(part, head, 1), d, q, k, v, parts[part], shape, head, space);
        }
#pragma omp for collapse(3) schedule(static)
        for (long which = 0; which < 2; which++)
            for (long head = 0; head < K; head++)
                for (long i = 0; i < D; i += LANES)
                    for (long part = 0; part < count; part++)
                        add_turned(which ? dv : dk, of(part, head, which), parts[part], shape, head, i);
    }
}

// `found` has room for so many numbers, which is enough for any one part: as many at a time as fit. Whether one did.
template <class T>
bool attend_backward_by_room(T *dq, float *dk, float *dv, float *found, const T *d, const T *q, const T *k, const T *v,
                             const Part *parts, long room, long count, const Shape &shape) {
    std::vector<long> place;
    for (long first = 0; first < count; first += place.size()) {
        place.clear();
        for (long part = first, taken = 0; part < count; part++) {
            long size = 2 * shape.K * shape.D * up(parts[part].keys());
            if (taken + size > room) break;
            place.push_back(taken);
            taken += size;
        }
        if (place.empty()) return false;
        attend_backward(dq, dk, dv, found, d, q, k, v, parts + first, place.data(), place.size(), shape);
    }
    return true;
}

}  // namespace

// Both return 0, or 1 where there is not enough memory.
#define FOR(T, NAME)                                                                                                   \
    int attend_##NAME(T *out, const T *q, const T *k, const T *v, const Part *parts, float scale, long count, long H,  \
                      long K, long D, long window) try {                                                               \
        attend(out, q, k, v, parts, count, Shape{H, K, D, window, scale});                                             \
        return 0;                                                                                                      \
    } catch (const std::bad_alloc &) {                                                                                 \
        return 1;                                                                                                      \
    }                                                                                                                  \
    int attend_backward_##NAME(T *dq, float *dk, float *dv, float *found, const T *d, const T *q, const T *k,          \
                               const T *v, const Part *parts, float scale, long room, long count, long H, long K,      \
                               long D, long window) try {                                                              \
        Shape shape{H, K, D, window, scale};                                                                           \
        return !attend_backward_by_room(dq, dk, dv, found, d, q, k, v, parts, room, count, shape);                     \
    } catch (const std::bad_alloc &) {                                                                                 \
        return 1;                                                                                                      \
    }

extern "C" {
FOR(float, fp32)
#ifdef __AVX512BF16__
FOR(bf16, bf16)
#endif
}
