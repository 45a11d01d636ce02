// SPDX-License-Identifier: BSD-3-Clause
// The protocol in shared memory: ranks of one host sum and copy values through a segment that all of them have mapped.
//
// A call goes in pieces. For each, a rank writes its part to one of its two slots, then the number of the piece to one of
// its two headers (release), waits until all ranks have published that number (acquire), compares the headers, and reads
// all slots in rank order. Headers and slots take turns. A rank writes to one again only after all others have published
// the piece that follows, which they do after they have read this one. So one wait a piece is enough.
//
// A large sum over three ranks or more takes two steps a piece: each rank adds a share of the values and writes the sums
// over its part of them, then all copy all shares. The order of the additions, and so the bits, are the same.
//
// W ranks.
#pragma once

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <utility>

namespace syncbn {

constexpr int NUMBERS_OF_CALL = 4;
constexpr std::size_t LINE = 64, FAREWELL_BYTES = 1024;

enum class Kind : uint16_t { float64_sum, float32_sum, copy, barrier };

struct Call {
    uint64_t length;  // values of a sum, bytes of a copy
    uint64_t done;    // bytes of the pieces before this one
    Kind kind;
    uint16_t slot;     // where this rank's values are; the others' may be in their other one
    uint32_t root;     // the rank that the others copy from; in the second step of a large sum 1
    double numbers[NUMBERS_OF_CALL];  // see moments.Numbers; the first one is 0 for a rank that abstains

    bool agrees(const Call& other) const {
        if (length != other.length || done != other.done || kind != other.kind || root != other.root) return false;
        if (numbers[0] == 0 || other.numbers[0] == 0) return true;
        return std::memcmp(numbers, other.numbers, sizeof numbers) == 0;
    }
};

struct alignas(LINE) Header {
    std::atomic<uint64_t> piece;  // the number of the last piece in this slot; pieces count from 1
    Call call;
};

struct alignas(LINE) Word {
    std::atomic<uint32_t> value;
};

struct Farewell {  // how a rank has ended, in its own words
    std::atomic<uint32_t> length;
    char text[FAREWELL_BYTES - sizeof(std::atomic<uint32_t>)];
};

static_assert(std::atomic<uint64_t>::is_always_lock_free && std::atomic<uint32_t>::is_always_lock_free);
static_assert(sizeof(Header) == LINE && sizeof(Word) == LINE && sizeof(Farewell) == FAREWELL_BYTES);

enum class Progress { done, waits, differs };

// One rank's view. Not for several threads at once.
class Segment {
public:
    static std::size_t size(uint32_t ranks, std::size_t slot) {
        return 3 * LINE + ranks * (FAREWELL_BYTES + 2 * (LINE + slot));
    }

    // A new segment is all zeros, which is its state before the first piece.
    Segment(void* memory, uint32_t rank, uint32_t ranks, std::size_t slot)
        : memory_(static_cast<char*>(memory)), slot_(slot), rank_(rank), ranks_(ranks) {}

    std::atomic<uint64_t>& key() { return reinterpret_cast<Header*>(memory_)->piece; }

    Farewell& farewell(uint32_t rank) {
        return *reinterpret_cast<Farewell*>(memory_ + 3 * LINE + rank * FAREWELL_BYTES);
    }

    bool in_call() const { return in_call_; }

    // The ranks that have not published the current piece: the first of them at or after ``from``, or W.
    uint32_t missing(uint32_t from) const {
        while (from < ranks_ && has_come(from)) ++from;
        return from;
    }

    void begin(const Call& call, void* data) {
        const uint16_t slot = call_.slot;
        call_ = call, data_ = static_cast<char*>(data), call_.done = 0, call_.slot = slot;
        in_call_ = true, published_ = false;
    }

    // Forgets the caller's memory: an exception ends the call on this rank. The next one waits for the piece first.
    void abandon() { data_ = nullptr; }

    // Goes on with the call. Returns ``waits`` after ``seconds`` of sleep, or at a signal: call it again.
    // ``differs``: ranks are in different calls, and all of them find that out in the same piece. Nothing has been read.
    Progress advance(double seconds, bool may_sleep = true) {
        while (true) {
            if (!published_) publish();
            if (!await(seconds, may_sleep)) return Progress::waits;
            const bool abandoned = data_ == nullptr, same = abandoned || all_agree();
            const std::size_t bytes = piece_bytes();
            const bool half = same && !abandoned && is_large() && call_.root == 0;
            if (half)
                add_share(bytes);
            else if (same && !abandoned)
                read(bytes);
            ++piece_, next_ = 0, published_ = false;
            if (is_large()) call_.root = half;
            if (half) continue;
            call_.done += bytes;
            if (abandoned || !same || call_.done == total_bytes()) {
                in_call_ = false;
                return same ? Progress::done : Progress::differs;
            }
        }
    }

private:
    static constexpr auto LEAST_SPIN = std::chrono::nanoseconds(200), MOST_SPIN = std::chrono::nanoseconds(4000);
#ifdef SYNCBN_LARGE  // bytes; the tests make it small
    static constexpr std::size_t LARGE = SYNCBN_LARGE;
#else
    static constexpr std::size_t LARGE = 1 << 16;
#endif
    static constexpr auto YIELDS = std::chrono::microseconds(150);
    using Clock = std::chrono::steady_clock;

    Word& bell() const { return reinterpret_cast<Word*>(memory_)[1]; }
    Word& sleepers() const { return reinterpret_cast<Word*>(memory_)[2]; }

    // A header, followed by a slot.
    char* half_of(uint32_t rank, uint64_t which) const {
        return memory_ + 3 * LINE + ranks_ * FAREWELL_BYTES + (2 * rank + which % 2) * (LINE + slot_);
    }
    Header& header(uint32_t rank) const { return *reinterpret_cast<Header*>(half_of(rank, piece_)); }
    char* values(uint32_t rank) const { return half_of(rank, header(rank).call.slot) + LINE; }

    bool has_come(uint32_t rank) const { return header(rank).piece.load(std::memory_order_acquire) == piece_; }

    std::size_t width() const {
        return call_.kind == Kind::float64_sum ? sizeof(double) : call_.kind == Kind::float32_sum ? sizeof(float) : 1;
    }
    std::size_t total_bytes() const { return call_.length * width(); }
    std::size_t piece_bytes() const { return std::min(slot_, total_bytes() - call_.done); }

    void publish() {
        const bool second = is_large() && call_.root == 1;
        if (!second) call_.slot ^= 1;
        Header& own = header(rank_);
        own.call = call_;
        if (!second && (call_.kind != Kind::copy || call_.root == rank_))
            std::memcpy(values(rank_), data_ + call_.done, piece_bytes());
        own.piece.store(piece_, std::memory_order_seq_cst);
        published_ = true;
        // Whoever sleeps has counted itself before its last look at the headers. So either it has seen this piece, or
        // this sees it. Of those that come last, one sees that all have come.
        if (sleepers().value.load(std::memory_order_seq_cst) > 0 && all_have_come()) ring();
    }

    bool all_have_come() { return (next_ = missing(next_)) == ranks_; }

    void ring() {
        bell().value.fetch_add(1, std::memory_order_seq_cst);
        syscall(SYS_futex, &bell().value, FUTEX_WAKE, INT32_MAX, nullptr, nullptr, 0);
    }

    // Spins, then yields, then sleeps. The time of spinning follows what has helped: with more ranks than cores it is
    // short, since the rank that is waited for needs the core.
    bool await(double seconds, bool may_sleep) {
        if (all_have_come()) return true;
        const auto began = Clock::now();
        for (auto now = began; now < began + spin_; now = Clock::now())
            for (int i = 0; i < 8; ++i) {
                relax();
                if (all_have_come()) return spin_ = std::min(2 * spin_, std::chrono::nanoseconds(MOST_SPIN)), true;
            }
        spin_ = std::max(spin_ / 2, std::chrono::nanoseconds(LEAST_SPIN));
        if (!may_sleep) return false;
        for (auto now = began; now < began + YIELDS; now = Clock::now()) {
            sched_yield();
            if (all_have_come()) return true;
        }
        return sleep(seconds);
    }

    bool sleep(double seconds) {
        sleepers().value.fetch_add(1, std::memory_order_seq_cst);
        const auto end = Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
        bool come = false, woken = true;
        while (woken) {
            const uint32_t rung = bell().value.load(std::memory_order_seq_cst);
            if ((come = all_have_come())) break;
            const auto left = std::chrono::duration_cast<std::chrono::nanoseconds>(end - Clock::now()).count();
            if (left <= 0) break;
            const timespec limit{time_t(left / 1000000000), long(left % 1000000000)};
            const long status = syscall(SYS_futex, &bell().value, FUTEX_WAIT, rung, &limit, nullptr, 0);
            woken = status == 0 || errno == EAGAIN;  // else it is late, or a signal has come
        }
        sleepers().value.fetch_sub(1, std::memory_order_seq_cst);
        return come || all_have_come();
    }

    static void relax() {
#if defined(__x86_64__) || defined(__i386__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    // Every rank compares all headers in the same way. One that abstains fits every call; the others must be in one.
    bool all_agree() const {
        const Call* voice = nullptr;
        for (uint32_t rank = 0; rank < ranks_; ++rank) {
            const Call& call = header(rank).call;
            if (voice != nullptr && !call.agrees(*voice)) return false;
            if (voice == nullptr || voice->numbers[0] == 0) voice = &call;
        }
        return true;
    }

    bool is_large() const {
        return ranks_ > 2 && call_.kind <= Kind::float32_sum && total_bytes() >= LARGE;
    }

    void read(std::size_t bytes) {
        if (call_.kind == Kind::copy) {
            if (call_.root != rank_) std::memcpy(data_ + call_.done, values(call_.root), bytes);
        } else if (is_large()) {
            for (uint32_t rank = 0; rank < ranks_; ++rank) {
                const auto [from, to] = share(rank, bytes);
                std::memcpy(data_ + call_.done + from, values(rank) + from, to - from);
            }
        } else {
            sum(0, bytes, data_ + call_.done);
        }
    }

    void add_share(std::size_t bytes) {
        const auto [from, to] = share(rank_, bytes);
        sum(from, to, values(rank_));
    }

    // The bytes of a piece that a rank adds, in whole cache lines.
    std::pair<std::size_t, std::size_t> share(uint32_t rank, std::size_t bytes) const {
        const std::size_t lines = (bytes / LINE + ranks_) / ranks_;
        return {std::min(rank * lines * LINE, bytes), std::min((rank + 1) * lines * LINE, bytes)};
    }

    void sum(std::size_t from, std::size_t to, char* out) {
        if (call_.kind == Kind::float64_sum)
            add<double>(from / sizeof(double), to / sizeof(double), reinterpret_cast<double*>(out));
        else if (call_.kind == Kind::float32_sum)
            add<float>(from / sizeof(float), to / sizeof(float), reinterpret_cast<float*>(out));
    }

    // Adds in rank order, in float64, so that all ranks get the same bits.
    template <class T> void add(std::size_t from, std::size_t to, T* out) {
        constexpr std::size_t BLOCK = 512;
        const T* own = reinterpret_cast<const T*>(data_ + call_.done);
        double total[BLOCK];
        for (std::size_t i = from; i < to; i += BLOCK) {
            const std::size_t n = std::min(BLOCK, to - i);
            for (uint32_t rank = 0; rank < ranks_; ++rank) {
                const T* part = (rank == rank_ ? own : reinterpret_cast<const T*>(values(rank))) + i;
                if (rank == 0)
                    for (std::size_t j = 0; j < n; ++j) total[j] = double(part[j]);
                else
                    for (std::size_t j = 0; j < n; ++j) total[j] += double(part[j]);
            }
            for (std::size_t j = 0; j < n; ++j) out[i + j] = T(total[j]);
        }
    }

    char* memory_;
    std::size_t slot_;
    uint32_t rank_, ranks_;
    uint64_t piece_ = 1;
    uint32_t next_ = 0;  // all ranks before it have come
    std::chrono::nanoseconds spin_{MOST_SPIN};
    Call call_{};
    char* data_ = nullptr;
    bool in_call_ = false, published_ = false;
};

}  // namespace syncbn
