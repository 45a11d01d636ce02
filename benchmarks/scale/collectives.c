/* SPDX-License-Identifier: BSD-3-Clause */
#include "collectives.h"

#include <mpi.h>

/* Seconds to add one byte to another: 25 GB/s, a core that adds doubles from its cache. */
static const double SECONDS_PER_BYTE = 0.04e-9;

static struct line line_of(int base, int stride, int n, int rank)
{
    struct line line = {base, stride, n, (rank - base) / stride};
    return line;
}

/* The place of a rank among `ranks` consecutive ones that begin at `first`, which may be fewer than a node has. */
static struct place place_among(int rank, int first, int ranks, int per_node)
{
    if (per_node > ranks)
        per_node = ranks;
    const int local = (rank - first) % per_node, nodes = ranks / per_node;
    struct place place = {
        line_of(first, 1, ranks, rank),
        line_of(rank - local, 1, per_node, rank),
        line_of(first, per_node, nodes, rank - local),
        line_of(first + local, per_node, nodes, rank),
    };
    return place;
}

struct place place_of(int rank, int ranks, int per_node) { return place_among(rank, 0, ranks, per_node); }

struct place place_in_group(int rank, int group, int per_node)
{
    return place_among(rank, rank / group * group, group, per_node);
}

static int rank_at(const struct line *line, int i) { return line->base + line->stride * i; }

/* Sends and receives at once; either may be of 0 bytes, which is then left out. */
static void exchange(int to, const char *out, size_t out_bytes, int from, char *in, size_t in_bytes)
{
    MPI_Request requests[2] = {MPI_REQUEST_NULL, MPI_REQUEST_NULL};
    if (in_bytes)
        MPI_Irecv(in, (int)in_bytes, MPI_BYTE, from, 0, MPI_COMM_WORLD, &requests[0]);
    if (out_bytes)
        MPI_Isend(out, (int)out_bytes, MPI_BYTE, to, 0, MPI_COMM_WORLD, &requests[1]);
    MPI_Waitall(2, requests, MPI_STATUSES_IGNORE);
}

static void add(char *buffer, const char *scratch, size_t bytes, enum payload payload)
{
    smpi_execute_benched(SECONDS_PER_BYTE * (double)bytes);
    if (payload == REAL)
        for (size_t i = 0; i < bytes / sizeof(double); i++)
            ((double *)buffer)[i] += ((const double *)scratch)[i];
}

/* Recursive doubling: log2 n rounds, the whole message in each. */
static void double_sums(const struct line *line, char *buffer, char *scratch, size_t bytes, enum payload payload)
{
    for (int distance = 1; distance < line->n; distance *= 2) {
        const int other = rank_at(line, line->me ^ distance);
        exchange(other, buffer, bytes, other, scratch, bytes);
        add(buffer, scratch, bytes, payload);
    }
}

/* A binomial tree towards the line's first rank. */
static void reduce(const struct line *line, char *buffer, char *scratch, size_t bytes, enum payload payload)
{
    for (int distance = 1; distance < line->n; distance *= 2) {
        if (line->me & distance) {
            exchange(rank_at(line, line->me - distance), buffer, bytes, 0, NULL, 0);
            return;
        }
        exchange(0, NULL, 0, rank_at(line, line->me + distance), scratch, bytes);
        add(buffer, scratch, bytes, payload);
    }
}

/* A binomial tree from the line's first rank. */
static void broadcast(const struct line *line, char *buffer, size_t bytes)
{
    for (int distance = line->n / 2; distance > 0; distance /= 2) {
        if (line->me % (2 * distance) == 0)
            exchange(rank_at(line, line->me + distance), buffer, bytes, 0, NULL, 0);
        else if (line->me % distance == 0)
            exchange(0, NULL, 0, rank_at(line, line->me - distance), buffer, bytes);
    }
}

void all_reduce_doubling(const struct place *place, char *buffer, char *scratch, size_t bytes, enum payload payload)
{
    double_sums(&place->all, buffer, scratch, bytes, payload);
}

/* Node by node: summed inside each node, then among the nodes' first ranks, then handed out inside each node. */
void all_reduce_nodes(const struct place *place, char *buffer, char *scratch, size_t bytes, enum payload payload)
{
    reduce(&place->node, buffer, scratch, bytes, payload);
    if (place->node.me == 0)
        double_sums(&place->leaders, buffer, scratch, bytes, payload);
    broadcast(&place->node, buffer, bytes);
}

/* n - 1 rounds of one block: the usual way of NCCL, and of MPI libraries when messages are large. */
void all_gather_ring(const struct place *place, char *buffer, size_t block, int rounds)
{
    const struct line *line = &place->all;
    const int n = line->n, right = rank_at(line, (line->me + 1) % n), left = rank_at(line, (line->me + n - 1) % n);
    if (rounds == 0 || rounds > n - 1)
        rounds = n - 1;
    for (int round = 0; round < rounds; round++) {
        const size_t out = (size_t)((line->me - round + n) % n), in = (size_t)((line->me - round - 1 + n) % n);
        exchange(right, buffer + out * block, block, left, buffer + in * block, block);
    }
}

/* Recursive doubling: log2 n rounds of 1, 2, 4, ... blocks. Bruck's algorithm sends as much in as many rounds. */
static void double_blocks(const struct line *line, char *buffer, size_t block)
{
    for (int distance = 1; distance < line->n; distance *= 2) {
        const int mine = line->me & ~(distance - 1), theirs = mine ^ distance, other = rank_at(line, line->me ^ distance);
        const size_t bytes = block * (size_t)distance;
        exchange(other, buffer + (size_t)mine * block, bytes, other, buffer + (size_t)theirs * block, bytes);
    }
}

void all_gather_doubling(const struct place *place, char *buffer, size_t block, int rounds)
{
    (void)rounds;
    double_blocks(&place->all, buffer, block);
}

/* Two levels, one rank a node: to its first rank, among these, and to all again. */
void all_gather_leaders(const struct place *place, char *buffer, size_t block, int rounds)
{
    const struct line *node = &place->node, *leaders = &place->leaders;
    char *const own = buffer + (size_t)leaders->me * (size_t)node->n * block;
    (void)rounds;
    for (int distance = 1; distance < node->n; distance *= 2) {
        const size_t bytes = block * (size_t)distance;
        if (node->me & distance) {
            exchange(rank_at(node, node->me - distance), own + (size_t)node->me * block, bytes, 0, NULL, 0);
            break;
        }
        exchange(0, NULL, 0, rank_at(node, node->me + distance), own + (size_t)(node->me + distance) * block, bytes);
    }
    if (node->me == 0)
        double_blocks(leaders, buffer, block * (size_t)node->n);
    broadcast(node, buffer, block * (size_t)node->n * (size_t)leaders->n);
}

/* Two levels, all ranks of a node: each gathers from the ranks with its place on the other nodes, then the node's ranks
   exchange what they got. Blocks lie by place, then node: the merge of statistics takes them in any order. */
void all_gather_slices(const struct place *place, char *buffer, size_t block, int rounds)
{
    const size_t slice = block * (size_t)place->peers.n;
    (void)rounds;
    double_blocks(&place->peers, buffer + (size_t)place->node.me * slice, block);
    double_blocks(&place->node, buffer, slice);
}
